"""Methods that choose weights while the model trains."""
