"""The paper's experiments beside its main table. What they measure with lies in the layers to the left."""
