"""The offline trainer: data, networks, training, export and evaluation. The only place with torch."""
