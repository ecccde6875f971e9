"""Activity of neurons and synapses while a model reads. Imports `bdh.model` only."""

from bdh.insight.observer import Observer
from bdh.insight.record import Record
from bdh.insight.study import LayerStudy, LayerView, Synapse, neuron_activity

__all__ = ["LayerStudy", "LayerView", "Observer", "Record", "Synapse", "neuron_activity"]
