"""The seed's experiment: a two-layer transformer in many layouts, recorded, priced and predicted at any size."""
