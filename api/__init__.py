"""HTTP gateway: FastAPI on the Ray Serve ingress. Stateless; the core decides, this layer talks."""
