"""Attention of other libraries on a grid."""
