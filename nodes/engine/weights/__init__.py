"""How a component's weights are held: precisions, stored formats, the layers that use them, their size."""
