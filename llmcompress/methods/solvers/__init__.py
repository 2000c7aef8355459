"""Parts that methods share: feedback, grids, Hessians, low-rank factors, searches."""
