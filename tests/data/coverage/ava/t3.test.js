import test from 'ava';
import {div} from './src/math.js';

test('divides', t => t.is(div(4, 2), 2));
