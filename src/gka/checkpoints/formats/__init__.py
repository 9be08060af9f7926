"""The foreign formats that the library knows, a table each, in the order in which messages list them."""

from gka.checkpoints.format import register
from gka.checkpoints.formats import fla, hybrid, plain

register(*hybrid.FORMATS, *fla.FORMATS, *plain.FORMATS)
