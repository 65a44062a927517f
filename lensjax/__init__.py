"""Preference-based, contrastive policy learning for working contexts, in JAX.

A language model reads a fixed budget of entries, some spans token by token, the rest as gists. LensNet is the
policy which scores what deserves detail; it learns from the differences in next-token loss between random
contexts of one length.

Import what you need from its module: `from lensjax import config, context, losses, nll, preferences, rollouts`.
"""

__version__ = "0.1.0"
