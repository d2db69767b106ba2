"""The projection from theta to the weights and its adjoint, on every backend. Independent of models and layers."""
