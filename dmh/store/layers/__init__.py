"""What sits between dmh and a page store and changes what that gets to see: each an `OpenStore` over another one."""
