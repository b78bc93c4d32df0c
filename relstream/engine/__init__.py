"""One running client, built of its parts."""
