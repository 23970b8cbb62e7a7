"""The bundled models: data, training, judges, publishing; and models of true size with random weights."""
