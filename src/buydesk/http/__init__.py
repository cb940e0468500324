"""HTTP: the server, the app shell that every service shares, and what of them is documented."""
