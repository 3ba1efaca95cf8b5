# SPDX-License-Identifier: Apache-2.0
"""LoRA as a transform of any JAX function over a parameter pytree. Imports jax and numpy only.

spec     = lora.Spec(rank=16, alpha=32, targets=r".*/(query|key|value|out)/kernel")
adapters = lora.init(spec, params, key=key)
g        = lora.transform(f)                  # g(params, adapters, *args): f with W + scale * A B, never formed
"""

from jft.lora import peft as peft
from jft.lora.emit import MODES as MODES
from jft.lora.interpret import MaterializeError as MaterializeError
from jft.lora.interpret import Use as Use
from jft.lora.interpret import explain as explain
from jft.lora.interpret import transform as transform
from jft.lora.spec import Adapters as Adapters
from jft.lora.spec import Factors as Factors
from jft.lora.spec import Spec as Spec
from jft.lora.spec import check as check
from jft.lora.spec import delta as delta
from jft.lora.spec import init as init
from jft.lora.spec import merge as merge
