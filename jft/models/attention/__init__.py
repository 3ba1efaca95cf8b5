def choose(backend, c, T, dtype, *, context=1):
    return "splash" if backend == "tpu" else "plain"


def attend(
    c,
    q,
    k,
    v,
    segments_BT,
    segments_BS,
    *,
    window,
    start=0,
    sinks_N=None,
    implementation="plain",
    interpret=False,
):
    import jax.numpy as jnp

    from jft.models.attention import blockwise, plain, splash

    if implementation == "plain":
        mask = plain.visible(
            segments_BT, segments_BS, start + jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), window
        )
        return plain.attend(c, q, k, v, mask, sinks_N)
    f = {"splash": splash.attend, "blockwise": blockwise.attend}[implementation]
    return f(
        c,
        q,
        k,
        v,
        segments_BT,
        segments_BS,
        window=window,
        start=start,
        sinks_N=sinks_N,
        **({"interpret": False} if f is splash.attend else {}),
    )
