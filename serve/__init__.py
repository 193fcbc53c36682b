"""The Ray Serve application: ingress, controller and node agents around a pure core."""
