//! Starts the console.

import { render } from 'preact';

import { App } from './app';
import { takeCredentials } from './credentials';
import { applyTheme } from './theme';
import './style.css';

applyTheme();
takeCredentials();
const root = document.getElementById('app');
if (root) render(<App />, root);
