"""Attention by kernels that other people keep: JAX's own Splash attention for TPUs, cuDNN's for NVIDIA GPUs.

Both take whole rows (the queries stand where the keys stand) and never make the L x L scores. Shapes are those of
`fusejax.models.attention`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.models.attention import Alibi, Features, Tokens, visible

_LANES = 128  # rows are a multiple of it for Splash
_BLOCK = 512  # of queries and of keys, where the row's length is a multiple


def splash(
    query_BLNK: jax.Array,
    key_BLGK: jax.Array,
    value_BLGK: jax.Array,
    tokens: Tokens,
    features: Features,
    mesh: jax.sharding.Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by `jax.experimental.pallas.ops.tpu.splash_attention`; honours everything but `Alibi.bf16`.

    Mosaic kernels cannot be partitioned by the compiler, so over a mesh each device runs its own rows and heads.
    interpret: run the kernel's operations one by one, on any platform.
    """
    query_BLNK = (query_BLNK * features.scale).astype(query_BLNK.dtype)  # the kernel has no scale
    if features.alibi is not None:
        query_BLNK, key_BLGK = with_alibi(query_BLNK, key_BLGK, tokens.positions_BL, features.alibi)
    run = partial(_splash_local, features=features, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return run(query_BLNK, key_BLGK, value_BLGK, tokens.segments_BL)
    from fusejax import sharding

    n_rows, _, n_heads, _ = query_BLNK.shape
    heads, rows = sharding.attention_specs(mesh, n_rows, n_heads, key_BLGK.shape[2])
    segments = tokens.segments_BL
    return jax.shard_map(
        run, mesh=mesh, in_specs=(heads, heads, heads, None if segments is None else rows), out_specs=heads,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )(query_BLNK, key_BLGK, value_BLGK, segments)  # fmt: skip


def _splash_local(
    query_BLNK: jax.Array,
    key_BLGK: jax.Array,
    value_BLGK: jax.Array,
    segments_BL: jax.Array | None,
    features: Features,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, n_heads, width = query_BLNK.shape[1], query_BLNK.shape[2], value_BLGK.shape[3]
    padded = -(-length // _LANES) * _LANES

    def head_first(x_BLNK: jax.Array) -> jax.Array:
        # What is added on the right is after every token, so that none sees it.
        return jnp.pad(x_BLNK, ((0, 0), (0, padded - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    if features.window is None:
        mask: masks.Mask = masks.CausalMask((padded, padded))
    else:
        mask = masks.LocalMask((padded, padded), (features.window - 1, 0), offset=0)
    block = next(size for size in (_BLOCK, 384, 256, _LANES) if padded % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=features.softcap, interpret=interpret,
    )  # fmt: skip
    segments = None
    if segments_BL is not None:
        segments_BL = jnp.pad(segments_BL, ((0, 0), (0, padded - length)))
        segments = kernels.SegmentIds(segments_BL, segments_BL)
    mixed_BNLK = jax.vmap(kernel)(*(head_first(x) for x in (query_BLNK, key_BLGK, value_BLGK)), segments)
    return mixed_BNLK.transpose(0, 2, 1, 3)[:, :length, :, :width]


def with_alibi(
    query_BLNK: jax.Array, key_BLGK: jax.Array, positions_BL: jax.Array, alibi: Alibi
) -> tuple[jax.Array, jax.Array]:
    """Queries (already scaled) and keys with 6 more features, by which their product holds ALiBi's bias.

    So a kernel need not know of it. The bias slope * (key position - query position) differs by a constant of the
    query, which softmax ignores, from slope * key position. Slope and position are split into parts that bfloat16 holds
    exactly (three of 8 bits; two digits to base 256), so that the products, added in float32, are right to float32 for
    positions below 65,536.
    """
    rest = np.asarray(alibi.slopes, np.float64) * alibi.scale
    slopes = []
    for _ in range(3):
        slopes.append(rest.astype(jnp.bfloat16).astype(np.float64))
        rest = rest - slopes[-1]
    slopes_N6 = np.stack([part * base for part in slopes for base in (256.0, 1.0)], axis=-1)
    digits_BL6 = jnp.stack([positions_BL // 256, positions_BL % 256] * 3, axis=-1)
    (B, L, N, _), G = query_BLNK.shape, key_BLGK.shape[2]
    more_query = jnp.broadcast_to(jnp.asarray(slopes_N6, query_BLNK.dtype), (B, L, N, 6))
    more_key = jnp.broadcast_to(digits_BL6[:, :, None].astype(key_BLGK.dtype), (B, L, G, 6))
    return jnp.concatenate([query_BLNK, more_query], -1), jnp.concatenate([key_BLGK, more_key], -1)


def cudnn(
    query_BLNK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, tokens: Tokens, features: Features
) -> jax.Array:
    """`attend` by cuDNN's flash attention, through `jax.nn.dot_product_attention`.

    It knows no segment ids: where there are some they come as a mask [B, 1, L, L], which all heads share.
    """
    window = None if features.window is None else (features.window - 1, 0)
    mask = None if tokens.segments_BL is None else visible(tokens, tokens, features.window)
    return jax.nn.dot_product_attention(
        query_BLNK, key_BLGK, value_BLGK, mask=mask, scale=features.scale, is_causal=True, local_window_size=window,
        implementation="cudnn",
    )  # fmt: skip
