# SPDX-License-Identifier: Apache-2.0
"""The cheapest change that makes a setting fit, found by compiling it."""

from jft import errors, sharding
from jft.plan import changes, compiled


def cheapest(result: compiled.Result, *, say: compiled.Say) -> compiled.Setting | None:
    """The setting that fits with the least change; None if no change of a setting on these devices is enough.

    Args:
      result: of a setting that does not fit.
      say: is told what goes on.
    """
    own = result.setting
    if not result.train.fits():
        own = _train(own, say)
    if own is not None and result.evaluation is not None and not result.evaluation.fits():
        own = _evaluation(own, say)
    return own


def _train(own: compiled.Setting, say: compiled.Say) -> compiled.Setting | None:
    built = own.program
    rows = 1 if built.layout is None else built.layout.rows
    chain = changes.chain(
        own.config, rows, built.micro_batch, offload=own.on.chip.platform != "cpu"
    )

    def fits(change: changes.Changes) -> bool:
        told = " ".join(f"{key}={text}" for key, text in change.items())
        step = compiled.compile_step(
            own.changed(change),
            compiled.TRAIN,
            explain=False,
            say=lambda line: say(f"{line} with {told}"),
        )
        return step.fits()

    found = changes.first_that_fits(chain, fits)
    if found is not None:
        return own.changed(found)
    strongest = own.changed(chain[-1]) if chain else own
    return next((one for one in _other_meshes(strongest) if _fits(one, say)), None)


def _other_meshes(own: compiled.Setting) -> list[compiled.Setting]:
    """Possible ones, each with a row at a time on each device."""
    found = []
    layout = own.layout()
    if layout is None:
        return []
    sizes = sharding.Sizes(**own.config.mesh).over(len(own.on.devices))
    for change in changes.meshes(sizes):
        try:
            other = own.changed(change)
            other.program  # noqa: B018 - heads, positions or rows may not be divided by this mesh
        except errors.UserError:
            continue
        found.append(other)
    return found


def _fits(own: compiled.Setting, say: compiled.Say) -> bool:
    return compiled.compile_step(own, compiled.TRAIN, explain=False, say=say).fits()


def _evaluation(own: compiled.Setting, say: compiled.Say) -> compiled.Setting | None:
    built = own.program
    rows = 1 if built.layout is None else built.layout.rows

    def fits(change: changes.Changes) -> bool:
        step = compiled.compile_step(own.changed(change), compiled.EVALUATE, explain=False, say=say)
        return step.fits()

    if fits({}):  # what helped training may help here: its micro-batch
        return own
    found = changes.first_that_fits(changes.eval_chain(rows, built.eval_batch), fits)
    return None if found is None else own.changed(found)
