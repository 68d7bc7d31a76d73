"""What language models are compared with: chance, popularity, neighbours, factors, and small sequential networks."""
