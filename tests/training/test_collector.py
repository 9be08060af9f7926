"""What Python's garbage collector does during training."""

import gc
import weakref

from gka.training.collector import frozen_heap


def test_only_new_garbage_is_looked_at() -> None:
    """In the block the collector skips what existed before and finds cycles made since; afterwards it looks
    at everything again."""

    class Node:
        pass

    with frozen_heap():
        assert gc.get_freeze_count() > 10_000
        node = Node()
        node.own = node  # pyright: ignore[reportAttributeAccessIssue]
        seen = weakref.ref(node)
        del node
        gc.collect()
        assert seen() is None
    assert gc.get_freeze_count() == 0
