import test from 'ava';

test('good', t => t.pass());
