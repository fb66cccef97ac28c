import test from 'ava';
import {add} from './src/math.js';

test('hangs', async t => {
  t.is(add(1, 2), 3);
  await new Promise(resolve => setTimeout(resolve, 600_000));
});
