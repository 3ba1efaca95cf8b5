# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a stranger's adapter_config.json on the names of modules, within a limit of time.

Python's engine tries every way to match, and has no limit: `(x*)*y` takes longer than anybody waits. An expression that
could be one of these is tried in a process of its own, which can be ended.
"""

import functools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence

from jft import errors

SECONDS = 10
LONGEST = 20_000  # characters
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_OF_GROUPS = re.compile(r"\)[*+{]")
_FEW = 4  # repeats one after the other take n**4 steps on a name of n characters
_PROGRAM = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
asked = json.load(sys.stdin)
match = getattr(re.compile(asked["expression"]), asked["how"])
found = [match(name) for name in asked["names"]]
json.dump([x and [x.groupdict().get("layer")] for x in found], sys.stdout)
"""


def compiled(expression: str) -> re.Pattern[str]:
    """An expression; raises ValueError for what is none."""
    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, more than {LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions may read otherwise
            return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


@functools.lru_cache(maxsize=256)
def hits(expression: str, names: tuple[str, ...], how: str, where: str) -> Mapping[str, str | None]:
    """The names that an expression matches, each with what its group "layer" holds.

    Args:
      expression: that `compiled` takes.
      names: of modules.
      how: "match" from the start, or "fullmatch".
      where: begins the message.

    Raises:
      UserError: it takes too long.
    """
    pattern = compiled(expression)
    if not _may_be_slow(expression) or not sys.executable:
        found = [getattr(pattern, how)(name) for name in names]
        layers = [match and [match.groupdict().get("layer")] for match in found]
    else:
        layers = _apart(expression, names, how, where)
    return {name: layer[0] for name, layer in zip(names, layers, strict=True) if layer}


def _may_be_slow(expression: str) -> bool:
    return (
        len(_REPEATS.findall(expression)) > _FEW
        or bool(_OF_GROUPS.search(expression))
        or "(?P=" in expression
        or re.search(r"\\[1-9]", expression) is not None
    )


def _apart(
    expression: str, names: Sequence[str], how: str, where: str
) -> list[list[str | None] | None]:
    asked = json.dumps({"expression": expression, "names": names, "how": how})
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise errors.UserError(
            f"{where}: the expression {expression!r:.200} takes more than {SECONDS} s on this base's names; write another"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise errors.UserError(f"{where}: the expression {expression!r:.200}: {error}") from error
    return json.loads(done.stdout)
