"""Who decodes: monde, and the ways that others take, each as its users would set it up."""
