//! The console's build: one page, relative paths, into `dist`, from where the binary embeds it.

import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vite';

export default defineConfig({
  base: './',
  oxc: { jsx: { runtime: 'automatic', importSource: 'preact' } },
  resolve: {
    // The SDK from its sources, so that the console builds without building the SDK first; its mqtt is the console's.
    alias: {
      '@carillon/client': fileURLToPath(new URL('../client/js/src/index.ts', import.meta.url)),
    },
    dedupe: ['mqtt'],
  },
  // `npm run dev` shows changes at once; the API is that of a server that runs.
  server: { proxy: { '/v1': process.env['CARILLON_HTTP'] ?? 'http://127.0.0.1:8080' } },
  build: {
    outDir: 'dist',
    target: 'es2022',
    modulePreload: { polyfill: false },
    // mqtt.js is most of it, and it comes in one piece.
    chunkSizeWarningLimit: 480,
  },
});
