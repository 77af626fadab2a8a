"""What each stage computes, and the two halls that stages which train share."""
