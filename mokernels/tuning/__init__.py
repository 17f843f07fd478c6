"""Measuring launch configurations: what a checkpoint multiplies, and which candidate is fastest."""

from mokernels.tuning.products import Product, products_of
from mokernels.tuning.search import Bench, Job, Outcome, jobs_for, search

__all__ = ["Bench", "Job", "Outcome", "Product", "jobs_for", "products_of", "search"]
