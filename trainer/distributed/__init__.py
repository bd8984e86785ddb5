"""Workers: who they are, how they meet, compute together and end."""
