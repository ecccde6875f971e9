"""Activity of neurons and synapses while a model reads. Imports `bdh.model` only."""

from bdh.insight.activity_record import Record
from bdh.insight.layer_study import LayerStudy, LayerView, Synapse, neuron_activity
from bdh.insight.observer import Observer

__all__ = ["LayerStudy", "LayerView", "Observer", "Record", "Synapse", "neuron_activity"]
