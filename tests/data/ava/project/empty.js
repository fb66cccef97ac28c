// Imports AVA and declares nothing.
import 'ava';
