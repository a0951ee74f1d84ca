"""The embedded reference models: weights, model cards, prepared artifacts and the recipe that made them."""
