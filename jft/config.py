# SPDX-License-Identifier: Apache-2.0
"""The configuration: every key is declared here once, with its comment.

A configuration file holds `get_config(arg)`, starts from `base()` and changes what it needs; flags change single keys
(`--config.optim.learning_rate=1e-4`). A key that is not here is an error that names the nearest one.
"""

import difflib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jft import errors


def base() -> config_dict.ConfigDict:
    """The defaults of every key; the dictionary is locked, so a typo in a configuration file is an error."""
    c = config_dict.ConfigDict()
    c.run_dir = "runs/default"  # where everything of the run goes; an existing run there is resumed
    c.seed = 0  # of the data order, the split and the adapter's first values

    c.model = m = config_dict.ConfigDict()
    m.path = "smollm2-135m-instruct"  # a folder, a Hub name, a .gguf file, or this embedded model
    m.revision = ""  # of a Hub name: branch, tag or commit; "" = its main branch
    # The frozen base kept in 4 or 8 bits (QLoRA): none, nf4, int4, int8.
    m.quantize = "none"
    m.quantize_embeddings = "none"  # its embedding and head likewise: none, int8
    m.dtype = "float32"  # of the computation and of frozen weights: float32, bfloat16

    c.lora = lora = config_dict.ConfigDict()
    lora.rank = 16  # r; 0 = no adapter: every weight is trained
    lora.alpha = 32.0  # the update is alpha / r * A B
    lora.targets = r"layers/.*/(query|key|value|qkv|out|gate|up|gate_up|down)/kernel"  # regular expression over leaves
    lora.exclude = ""  # of the targets, those to leave alone; "" = none
    lora.dropout = 0.0  # rate for the input of A in training
    lora.use_rslora = False  # alpha / sqrt(r) instead
    lora.use_dora = False  # a trained magnitude for each output, beside A and B
    lora.mode = "auto"  # how products are emitted: factored, hidden, merged; auto = merged on CPU

    c.data = data = config_dict.ConfigDict()
    data.train = ""  # files, folders or Hub names, separated by commas: .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt
    data.weights = ""  # how often each of them stands in an epoch, as in "1,0.25"; "" = once
    data.valid = ""  # a source likewise; "" = hold out `valid_fraction` of train
    data.valid_fraction = (
        0.1  # of the rows; rows with equal prompts and near duplicates stay together
    )
    data.test = ""  # held-out rows for base against tuned at the end; "" = the validation rows
    data.columns = columns = config_dict.ConfigDict()
    columns.prompt = ""  # names of columns where they are not the usual ones
    columns.response = ""
    columns.messages = ""
    columns.system = ""
    columns.text = ""
    columns.chosen = ""
    columns.rejected = ""
    columns.label = ""
    columns.tools = ""
    data.header = True  # .csv and .tsv begin with a line of names; False: columns are "0", "1", ...
    data.separator = ""  # splits the text column into a prompt, up to and with it, and its response
    data.train_on = (
        "assistant"  # all assistant turns; last; weight (turns with weight 1); everything
    )
    data.system = ""  # system message for conversations that have none; "" = the template's own
    data.chat_template = (
        ""  # in place of the tokenizer's: a Jinja file, or "plain" (prompt, response, end token)
    )
    data.max_length = 1024  # positions in a row of a batch
    data.overlength = "error"  # longer rows: error, drop, truncate_prompt, split
    data.packing = (
        True  # several examples in one row, apart by segment; False: rows of like length in a batch
    )
    data.allow = ""  # errors of the data check to train in spite of, as in "leak"

    c.optim = optim = config_dict.ConfigDict()
    optim.learning_rate = 2e-4  # the peak; full fine-tuning wants about a tenth
    optim.schedule = "cosine"  # cosine, linear, constant
    optim.warmup_fraction = 0.03  # of all steps
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.lora_plus_ratio = 1.0  # learning rate of B over that of A (LoRA+ found 16 to be good)
    optim.clip_norm = 1.0  # largest global norm of a gradient; 0 = no clipping
    optim.max_skipped = 5  # steps in a row that are left out because loss or gradient is not finite; one more stops the run

    c.batch_size = 8  # rows in one step, on all devices together
    c.micro_batch = (
        0  # rows in one forward pass, likewise; 0 = about 512 tokens a device on CPU, all elsewhere
    )
    c.epochs = 3.0  # over the training rows
    c.steps = 0  # if not 0, instead of epochs
    c.remat = "auto"  # what the backward pass keeps: none (all), products, attention, full (nothing), dots, offload, offload_attention; auto = what fits
    c.router_loss = 0.0  # weight of the load-balance loss of a mixture of experts; usual: 0.001
    c.eval_batch_size = 0  # rows in one validation batch; 0 = as micro_batch

    c.mesh = mesh = config_dict.ConfigDict()  # devices along each axis; one may be -1: what is left
    mesh.slice = 1  # rows of a batch, over the data centre's network: TPU slices
    mesh.data = 1  # rows of a batch, weights copied
    mesh.fsdp = -1  # rows of a batch, weights split and gathered layer by layer
    mesh.expert = 1  # likewise, and the experts of a mixture
    mesh.context = 1  # positions of a row
    mesh.tensor = 1  # heads and the MLP's inner dimension

    c.validate = validate = config_dict.ConfigDict()
    validate.every_steps = 0  # 0 = four times in a run
    validate.samples = 64  # held-out prompts answered by base and tuned at the end; 0 = none
    validate.max_new_tokens = 128  # in each answer
    validate.format = (
        ""  # what a valid answer is: "" (anything), "json" (the reference's keys and types)
    )

    c.checkpoint = checkpoint = config_dict.ConfigDict()
    checkpoint.every_steps = (
        50  # also at the end, at a best validation and on Ctrl-C; 0 = not by steps
    )
    checkpoint.every_minutes = 10.0  # since the last one, whichever comes first; 0 = not by time
    checkpoint.keep = 2  # newest checkpoints that stay, beside the best one
    checkpoint.folder = ""  # where they go, also gs://...; "" = checkpoints/ in run_dir
    return c.lock()


# Keys that may differ when a run is resumed: they do not change what is computed, the last three but for rounding.
NOT_MATHEMATICS = (
    *("run_dir", "checkpoint.", "validate.", "eval_batch_size", "data.test", "optim.max_skipped"),
    *("mesh.", "micro_batch", "remat"),
)


def load(spec: str) -> config_dict.ConfigDict:
    """The configuration of "FILE" or "FILE:ARG".

    Raises:
      UserError: no such file, no get_config in it, or an error inside it, with its line.
    """
    path, _, arg = spec.partition(":")
    if not pathlib.Path(path).is_file():
        near = difflib.get_close_matches(
            path, map(str, pathlib.Path("configs").glob("*.py")), 1, 0.3
        )
        raise errors.UserError(
            f"--config={path}: no such file{f'; near: {near[0]}' if near else ''}"
        )
    module_spec = importlib.util.spec_from_file_location("jft_user_config", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise errors.UserError(f"--config={path}: it defines no get_config(arg)")
        config = module.get_config(arg) if arg else module.get_config()
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(f"--config={spec}: {_reason(error, path)}") from error
    return config


def _reason(error: Exception, path: str) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = str(error).split("\n")[0].strip("'\"")
    return (
        f"line {line}: {type(error).__name__}: {text}"
        if line
        else f"{type(error).__name__}: {text}"
    )


def override(config: config_dict.ConfigDict, key: str, text: str) -> None:
    """Sets one key from the text of a flag, in the key's own type.

    Raises:
      UserError: there is no such key (the nearest is named), it is a group, or the text does not fit its type.
    """
    keys = list(flatten(config))
    if key not in keys:
        group = [k for k in keys if k.startswith(f"{key}.")]
        near = group[:3] or difflib.get_close_matches(key, keys, 1, 0.0)
        what = "a group of keys" if group else "no configuration key"
        raise errors.UserError(f"--config.{key}: {what}; did you mean --config.{near[0]}?")
    *groups, last = key.split(".")
    owner = config
    for group in groups:
        owner = owner[group]
    old = owner[last]
    try:
        owner[last] = _parse(text, old)
    except ValueError as error:
        kind = type(old).__name__
        raise errors.UserError(f"--config.{key}={text}: {kind} wanted, as in {old!r}") from error


def _parse(text: str, old: Any) -> Any:
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    return type(old)(text)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value}, in order of declaration as far as ConfigDict keeps it."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def difference(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (here, there)} where they differ."""
    here, there = flatten(config), flatten(other)
    return {
        k: (here.get(k), there.get(k))
        for k in sorted(here.keys() | there.keys())
        if here.get(k) != there.get(k)
    }


def check_complete(config: config_dict.ConfigDict, where: str) -> None:
    """Raises UserError for a key that base() does not declare or has in another type, or lacks."""
    declared, given = flatten(base()), flatten(config)
    for key in given:
        if key not in declared:
            near = difflib.get_close_matches(key, declared, 1, 0.0)[0]
            raise errors.UserError(f"{where}: unknown key {key}; did you mean {near}?")
    for key, default in declared.items():
        if key not in given:
            raise errors.UserError(f"{where}: key {key} is missing: start from jft.config.base()")
        if type(given[key]) is not type(default):
            raise errors.UserError(
                f"{where}: {key}={given[key]!r} should be {type(default).__name__}, as {default!r}"
            )
