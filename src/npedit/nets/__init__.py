"""One trainable model: its weights, optimizer, LoRA adapters and EMA, and the processes that share it.

Nothing here knows what the model is trained for.
"""
