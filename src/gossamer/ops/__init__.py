"""Operations on sparse data: for each a plain reference, a compiled home and a dispatch."""
