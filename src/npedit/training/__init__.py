"""From a recipe to a trained editor: loading the models, the loop, samples, evaluation, launch, memory estimate."""
