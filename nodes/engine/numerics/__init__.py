"""How large activations get inside a model, measured, judged and drawn."""
