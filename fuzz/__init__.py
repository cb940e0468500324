"""What `make fuzz` runs, and `make test` shortly: calls made up by schemathesis from the OpenAPI documents."""
