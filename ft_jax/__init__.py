"""ft_jax: a laboratory for what fine-tuning does to a network's weights."""

__version__ = "0.1.0"
