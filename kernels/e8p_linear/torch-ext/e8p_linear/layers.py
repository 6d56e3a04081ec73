"""No layers: no module of a model holds lattice codes by itself."""
