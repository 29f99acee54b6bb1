"""Neural style transfer by optimisation: what stands behind `nst_utils`."""
