//! Numbers and times for people.

const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const time = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' });
const timeWithSeconds = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit', second: '2-digit' });
const dateAndTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' });

export function count(value: number): string {
  return whole.format(value);
}

/** A rate: one decimal below 100. */
export function rate(value: number): string {
  return value > 0 && value < 100 ? fine.format(value) : whole.format(value);
}

/** "3 s", "4 min", "2 h 5 min", "6 d". */
export function duration(ms: number): string {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d`;
}

export function clock(ms: number): string {
  return time.format(ms);
}

/** The time alone if it is today's. */
export function moment(ms: number): string {
  const today = new Date(ms).toDateString() === new Date().toDateString();
  return today ? timeWithSeconds.format(ms) : dateAndTime.format(ms);
}
