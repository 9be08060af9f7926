"""The known foreign formats, one table each, in the order of messages."""

from gka.checkpoints.format import register
from gka.checkpoints.formats import fla, hybrid, plain

register(*hybrid.FORMATS, *fla.FORMATS, *plain.FORMATS)
