"""The architecture. Importing this room makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know BDH."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bdh.model.configuration_bdh import BDHConfig
from bdh.model.modeling_bdh import BDHForCausalLM, BDHModel, BDHState, state_of

AutoConfig.register("bdh", BDHConfig)
AutoModel.register(BDHConfig, BDHModel)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM)

# What `save_pretrained` writes of the code: exports then load where `bdh` is not installed.
BDHConfig.register_for_auto_class()
BDHModel.register_for_auto_class("AutoModel")
BDHForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["BDHConfig", "BDHForCausalLM", "BDHModel", "BDHState", "state_of"]
