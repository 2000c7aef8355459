"""Changes to a dense model that leave its outputs as they are and make it easier to compress, fused into its weights:
a rotation of the residual stream, and scales of input channels."""

from llmcompress.fuse.awq import EXPONENTS, Balanced, balance, check_awq
from llmcompress.fuse.rotation import rotated_source
from llmcompress.recipe.fuse import Fuse

__all__ = ["EXPONENTS", "Balanced", "Fuse", "balance", "check_awq", "rotated_source"]
