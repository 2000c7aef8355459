"""Methods that store integers or floats of few bits."""
