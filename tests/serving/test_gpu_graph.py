"""On a GPU: decoding by a recorded step writes what launches one by one write; its memory is given back."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.layers import GatedKalmaNet
from gka.models import GKAForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (make test-gpu)"),
]

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
F32, BF16 = torch.float32, torch.bfloat16
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


def text(session: GenerationSession, tokens: int = 64, **options: Any) -> Tensor:
    """The next tokens [B,tokens]."""
    return torch.stack(list(session.generate(tokens, **options)), 1)


def pair(model: GKAForCausalLM, prompt: Tensor, *mask: Tensor) -> list[GenerationSession]:
    """A recorded session and one that is not, which have read the same."""
    return [GenerationSession(model, cuda_graph=x).append(prompt, *mask) for x in (True, False)]


def assert_same(recorded: GenerationSession, plain: GenerationSession) -> None:
    found, expected = text(recorded), text(plain)
    assert torch.equal(found, expected) and len(expected.unique()) > 5
    assert torch.equal(recorded.logits, plain.logits)  # type: ignore[arg-type]
    assert recorded.num_tokens == plain.num_tokens
    assert recorded.why_not_graphed is None


def gpu_model(build: Build, dtype: torch.dtype, mixer: str = "gka", **fields: Any) -> Any:
    model: Any = build(mixers=[mixer, mixer], dtype=dtype, **{**WIDE, **fields})
    return model.cuda()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mixer", ["gka", "gla", "deltanet", "gated_deltanet"])
def test_same_text_in_every_turn(
    build: Build, ids: Ids, tmp_path: Any, mixer: str, dtype: torch.dtype
) -> None:
    """Greedy text and logits are those of launches one by one, bit for bit: after a prompt, another one, a
    fork and a load; rows are padded on the left."""
    model, mask = gpu_model(build, dtype, mixer), torch.ones(3, 40).long()
    mask[1, :25] = 0
    recorded, plain = pair(model, ids(3, 40), mask)
    assert_same(recorded, plain)
    for session in (recorded, plain):
        session.append(ids(3, 33, seed=2))
    assert_same(recorded, plain)
    forks = recorded.fork(2), plain.fork(2)
    assert_same(*forks)
    plain.save(tmp_path / "state")
    assert_same(recorded, plain)
    for session in (recorded, plain):
        session.load(tmp_path / "state")
    assert_same(recorded, plain)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_splits_do_not_matter(build: Build, ids: Ids, head_dim: int) -> None:
    """Greedy text of 256 tokens in float32 is the same for any split of the prompt into appends, chunks and
    single steps."""
    model, prompt = gpu_model(build, F32, head_dim=head_dim), ids(2, 150)
    found = []
    for chunk, cuts in ((4096, ()), (1, ()), (7, ()), (64, (50,)), (20, (1, 2, 40, 149))):
        session = GenerationSession(model, prefill_chunk=chunk)
        for part in torch.tensor_split(prompt, cuts, 1):
            session.append(part)
        found.append(text(session, 256))
    assert all(torch.equal(x, found[0]) for x in found) and len(found[0].unique()) > 5


@pytest.mark.parametrize(
    "options", [{"solver": "adaptive"}, {"backend": "triton"}, {"head_dim": 32}]
)
def test_every_kernel_can_be_recorded(build: Build, ids: Ids, options: dict[str, Any]) -> None:
    """Both solvers, the Triton kernels, and widths that the Hopper kernel does not have."""
    assert_same(*pair(gpu_model(build, BF16, **options), ids(1, 50)))


def test_rows_that_end(build: Build, ids: Ids) -> None:
    """Rows that have ended wait for the others by a recording with a mask."""
    model, prompt = gpu_model(build, F32), ids(2, 6)
    free = text(GenerationSession(model, cuda_graph=False).append(prompt))
    end = next((int(x) for x in free[0, 2:40] if x not in free[1, :50]), int(free[0, 5]))
    recorded, plain = pair(model, prompt)
    assert torch.equal(text(recorded, eos_token_id=end), text(plain, eos_token_id=end))
    assert torch.equal(recorded.logits, plain.logits)  # type: ignore[arg-type]


def test_weights_that_change(build: Build, ids: Ids) -> None:
    """Weights written over, weights exchanged and other solver settings are followed."""
    model = gpu_model(build, BF16)
    recorded, plain = pair(model, ids(2, 20))
    assert_same(recorded, plain)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())
    assert_same(recorded, plain)
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()
    assert_same(recorded, plain)
    model.set_solver(num_iter=1)
    assert_same(recorded, plain)


def test_a_mixture_of_callers(build: Build, ids: Ids) -> None:
    """Inference mode, another stream, and sampling give what they give without a recording."""
    model = gpu_model(build, BF16)
    recorded, plain = pair(model, ids(2, 20))
    with torch.inference_mode():
        assert_same(recorded, plain)
    assert_same(recorded, plain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(recorded, plain)
    torch.cuda.synchronize()
    options: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    assert torch.equal(text(recorded, **options), text(plain, **options))


def test_memory_is_given_back(build: Build, ids: Ids) -> None:
    """Ten sessions one after the other leave no more behind than one."""
    model = gpu_model(build, BF16, vocab_size=50000)
    held = []
    for _ in range(10):
        text(GenerationSession(model, cuda_graph=True).append(ids(64, 20)), 4)
        gc.collect()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[-1]


def test_it_is_recorded(build: Build, ids: Ids) -> None:
    """A step is one launch of a graph, not of kernels, and the default records."""
    session = GenerationSession(gpu_model(build, BF16)).append(ids(1, 20))
    text(session, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        text(session, 4)
    names = [event.name for event in profile.events() or []]
    assert not any("gka" in name or name == "aten::mm" for name in names) and names


def test_what_cannot_be_recorded_raises(
    build: Build, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixer that waits for the device: its reason is told, nothing was read, and the session goes on."""
    model = gpu_model(build, BF16)
    recorded, plain = pair(model, ids(1, 20))
    mix = GatedKalmaNet.mix

    def waiting(self: Any, q: Tensor, *rest: Any) -> Any:
        assert q.sum().item() == q.sum().item()
        return mix(self, q, *rest)

    monkeypatch.setattr(GatedKalmaNet, "mix", waiting)
    steps = recorded.generate(5)
    assert torch.equal(next(steps), next(plain.generate(1)))
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph: .*captur"):
        next(steps)
    monkeypatch.undo()
    recorded.cuda_graph = False
    assert torch.equal(text(recorded), text(plain))
