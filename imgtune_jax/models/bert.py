"""BERT (1810.04805), a bidirectional post-norm transformer. MiniLM sentence encoders are BERTs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, pooling
from imgtune_jax.models.transformer import TextTower

INIT = initializers.Normal(0.02)


class Bert(TextTower):
    """Text tower that pools by the masked mean of the tokens (MiniLM) or by the first token.

    No token attends to padding, where `text_mask` is False. `pos_embed` includes the embedding of
    token type 0, since a single text has no other type. All matrices and embeddings are initialized
    with standard deviation 0.02. `hand_written_gradients=True` supports reverse mode only.
    """

    CONFIG_NAME: ClassVar[str] = "bert"
    VARIANTS: ClassVar[dict[str, dict[str, int]]] = {
        "minilm-l6": dict(width=384, depth=6, mlp_dim=1536, num_heads=12),
        "minilm-l12": dict(width=384, depth=12, mlp_dim=1536, num_heads=12),
        "base": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
        "large": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    }

    width: int = 384
    depth: int = 6
    mlp_dim: int = 1536
    num_heads: int = 12
    vocab_size: int = 30522
    max_length: int = 512
    pool: Literal["mean", "cls"] = "mean"
    act: str = "gelu"
    norm_epsilon: float = 1e-12

    def _block_fields(self) -> dict[str, Any]:
        return dict(post_norm=True, kernel_init=INIT)

    def _embed(self, inputs: Int[Array, "b l"], *, train: bool) -> Float[Array, "b l d"]:
        self._check_length(inputs.shape[1])
        x, _ = self._embed_tokens(inputs, INIT, INIT, self.max_length)
        x = self.norm("embed_norm")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _pool(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"], *, train: bool
    ) -> pooling.TowerOutput:
        del train  # no dropout
        if self.pool not in ("mean", "cls"):
            raise UserError(f"bert pool = {self.pool!r}; expected 'mean' or 'cls'")
        pooled = pooling.masked_mean(x, mask) if self.pool == "mean" else x[:, 0]
        return pooling.TowerOutput(pooled, x)
