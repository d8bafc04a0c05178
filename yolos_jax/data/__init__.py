"""The data path: records -> geometry -> plan -> loader, with pixels doing the work per image."""

from yolos_jax.data import geometry, loader, plan, records

__all__ = ['geometry', 'loader', 'plan', 'records']
