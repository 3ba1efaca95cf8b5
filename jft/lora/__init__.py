# SPDX-License-Identifier: Apache-2.0
"""LoRA as a transform of any JAX function over a parameter pytree. Imports jax and numpy only.

spec     = lora.Spec(rank=16, alpha=32, targets=r".*/(query|key|value|out)/kernel")
adapters = lora.init(spec, params, key=key)
g        = lora.transform(f)                  # g(params, adapters, *args): f with W + scale * A B, never formed
"""

from jft.lora import layouts as layouts
from jft.lora import peft as peft
from jft.lora.emit import MODES as MODES
from jft.lora.files import load as load
from jft.lora.files import save as save
from jft.lora.interpret import MaterializeError as MaterializeError
from jft.lora.interpret import Use as Use
from jft.lora.interpret import explain as explain
from jft.lora.interpret import transform as transform
from jft.lora.merge import Merged as Merged
from jft.lora.merge import Survival as Survival
from jft.lora.merge import add as add
from jft.lora.merge import delta as delta
from jft.lora.merge import merge as merge
from jft.lora.merge import unmerge as unmerge
from jft.lora.spec import Adapters as Adapters
from jft.lora.spec import Factors as Factors
from jft.lora.spec import Spec as Spec
from jft.lora.spec import check as check
from jft.lora.spec import divided as divided
from jft.lora.spec import init as init
from jft.lora.spec import neutral as neutral
from jft.lora.spec import partition_spec as partition_spec
from jft.lora.trees import Savings as Savings
from jft.lora.trees import join as join
from jft.lora.trees import savings as savings
from jft.lora.trees import split as split
from jft.lora.trees import stack as stack
from jft.lora.trees import unstack as unstack
