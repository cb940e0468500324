"""What runs on this machine beside the services: child processes, embedded servers, their data, ports, signals."""
